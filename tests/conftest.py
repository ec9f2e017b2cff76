"""Before any test module is imported: no network, a cache of its own for `datasets`, one thread."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory()  # gone with the test run
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=_CACHE.name, HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch  # noqa: E402

torch.set_num_threads(1)
