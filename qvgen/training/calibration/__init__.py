"""What the full-precision model shows a PTQ method: statistics of its layers' inputs, and of its attentions."""
