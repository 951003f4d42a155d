"""`python -m fpo_train` is `fpo-train`."""

from fpo_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
