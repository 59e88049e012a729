"""DeepSpeed training, evaluation and imputation (imports everything below it)."""
