"""The state that training starts from: a student that a PTQ method has set up, by one process or all of them."""
