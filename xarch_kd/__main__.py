"""`python -m xarch_kd` is `xarch-kd`."""

from xarch_kd.cli.app import run

if __name__ == "__main__":
    run()
