"""What the server tells about itself: logs, and how long its event loop was kept waiting."""
