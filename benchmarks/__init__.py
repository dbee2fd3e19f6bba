"""Speed against baselines, measured in one run and shown only where the results agree."""
