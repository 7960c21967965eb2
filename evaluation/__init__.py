"""What runs and pictures are measured by: tables, figures, pages, and the benchmarks' formats."""
