"""`diffusers-edu evaluate` as a script, for `accelerate launch` and `torchrun`."""

import sys

from diffusers_edu.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
