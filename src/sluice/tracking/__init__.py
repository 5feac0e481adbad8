"""What a run leaves behind: metrics, events, the ledger of every sample, and the console."""
