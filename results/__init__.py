"""What the recipes come to on real data: the plan, the runs, a record of each, and docs/results.md made of these."""
