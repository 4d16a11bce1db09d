"""`python -m bardling` is the `bardling` command; `torchrun -m bardling train ...` needs this form."""

from bardling.cli.main import main

if __name__ == "__main__":
    main()
