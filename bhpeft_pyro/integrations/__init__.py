"""Other libraries: ArviZ, Hugging Face, scikit-learn, MLflow and Ray, each imported here alone."""
