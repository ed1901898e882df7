"""`python -m secateur`, which is how launchers start it: `torchrun --nproc-per-node 8 -m secateur prune …`."""

from secateur.cli import main

if __name__ == "__main__":
    main()
