"""Reports before and after training: `explain`, its warnings, and figures."""
