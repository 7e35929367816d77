"""Model servers, as the dispatcher sees them."""
