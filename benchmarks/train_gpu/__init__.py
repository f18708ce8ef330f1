"""The program behind train_gpu.sh."""
