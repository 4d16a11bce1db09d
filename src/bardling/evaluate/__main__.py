"""`python -m bardling.evaluate run --model bardling --model_args path=RUN --tasks piqa`: lm-eval, which knows our models.

The arguments are those of `lm-eval`. Its releases after 0.4.13 find the model themselves.
"""

from bardling.errors import UserError

if __name__ == "__main__":
    try:
        from lm_eval.__main__ import cli_evaluate

        import bardling.evaluate.harness  # noqa: F401  registers the model

        cli_evaluate()
    except (UserError, ModuleNotFoundError) as error:
        raise SystemExit(f"bardling: {error}") from None
