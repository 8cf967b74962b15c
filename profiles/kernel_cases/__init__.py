"""What `profiles.bench_kernels` measures: for each op, named real shapes with the best alternatives beside it."""
