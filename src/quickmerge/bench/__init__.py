"""What every benchmark shares: quality of predictions, rows, and the charts of quality against cost."""
