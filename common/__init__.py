"""The chores of a run, one room per file; nothing in here imports dreamer.py or dreamer_utils."""
