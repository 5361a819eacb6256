"""Services around a trained agent: pages and servers that other programs and people talk to."""
