"""upslope and its peers, measured in turn on the same model, tokens and number of updates: see README.md here."""
