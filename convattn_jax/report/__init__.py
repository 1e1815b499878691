"""From run folders to one page that compares them: python -m convattn_jax.report."""
