"""``python -m bnfold``, and the ``bnfold`` command."""

from bnfold.cli import main

if __name__ == "__main__":
    main()
