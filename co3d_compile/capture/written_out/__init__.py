"""What was written out in smaller operators, by hand or by an exporter, as one operator again."""
