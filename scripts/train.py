"""`diffusers-edu train` as a script, for `accelerate launch` and `torchrun`."""

import sys

from diffusers_edu.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
