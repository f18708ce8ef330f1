"""Everything that decides a training, before anything is computed: the student's layers, the steps, the processes."""
