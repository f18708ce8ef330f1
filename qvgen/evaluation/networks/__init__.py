"""Networks that judge videos, as their authors published them; weights come from packages by name."""
