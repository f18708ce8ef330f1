"""What a run will do, need and cost, found out before anything is loaded."""
