"""The handwritten digits that ship with scikit-learn: a small CNN with batch norm."""
