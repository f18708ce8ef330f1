"""The low-rank helper modules Phi: their factors, their singular value decompositions and their decay."""
