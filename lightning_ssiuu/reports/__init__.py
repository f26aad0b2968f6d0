"""What is shown of finished runs: the audit's verdict and page, the comparison's tables and plots."""
