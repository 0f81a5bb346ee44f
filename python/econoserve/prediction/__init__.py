"""Response-length predictors: they see requests arrive and responses end, never a true length."""
