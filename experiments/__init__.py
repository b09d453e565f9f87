"""What README and docs quote: benchmarks, ablations, results. Nothing else imports from here."""
