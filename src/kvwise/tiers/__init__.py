"""Tiers: where the bytes of KV live, and the links between them. Who may use which page is the cache's business."""
