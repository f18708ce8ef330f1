"""Training methods: what is trained, and towards what. One leaf each."""
