"""`python -m bardling.evaluate run --model bardling --model_args path=RUN --tasks piqa`: lm-eval, which knows our models.

The arguments are those of `lm-eval`. Its releases after 0.4.13 find the model themselves.
"""

import sys

from bardling.errors import UserError


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import bardling.evaluate.harness  # noqa: F401  registers the model
    except ImportError as error:
        raise UserError(f"lm-eval needs the package {error.name}: pip install 'bardling[eval]'") from error
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as fault:
        print(f"bardling: {fault}", file=sys.stderr)
        sys.exit(2)
