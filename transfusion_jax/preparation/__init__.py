"""From files to shards of prepared documents."""
