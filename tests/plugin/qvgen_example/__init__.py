"""A package outside of qvgen: one PTQ method, one training method, one model family, one kernel backend."""
