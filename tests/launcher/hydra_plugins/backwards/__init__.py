"""A plug-in of Hydra for the tests; found as an installed one is."""
