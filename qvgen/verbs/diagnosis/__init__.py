"""Parts of `qvgen doctor`: the machine, the kernel of each kind of layer, the self-test, the times."""
