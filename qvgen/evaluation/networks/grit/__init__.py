"""GRiT (arXiv 2212.00280): objects in images, each with a box and a text."""
