"""`diffusers-edu publish` as a script."""

import sys

from diffusers_edu.cli import main

if __name__ == "__main__":
    main(["publish", *sys.argv[1:]])
