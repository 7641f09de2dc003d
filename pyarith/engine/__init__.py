"""The replay engine: capture one clean and one corrupted run, then replay every sender as a row."""
