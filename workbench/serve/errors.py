"""Say what is wrong with a request in the words and the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """Refuse a request.

    Attributes:
        status: Status of the response.
        message: One line for whoever asked.
        param: Field that is wrong, where it is one.
        code: A word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Give the error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }
