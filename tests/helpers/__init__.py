"""Fakes and small worlds that several tests share."""
