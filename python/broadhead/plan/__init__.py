"""What runs a problem: a row of the table on this device and in this build, and how its launch divides the work."""
