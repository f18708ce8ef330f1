"""Pure quantizer arithmetic: the grid, its ranges, rotation and packing. Depends on torch alone."""
