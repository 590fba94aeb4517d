// The API of the endpoint that this page came from, and its refusals in one sentence each.

const STORED = "fusionrec-key";

/** The endpoint did not answer the question. */
export class Refusal extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

export class Client {
  /** The key that goes with every request; kept for this tab only. */
  get key() {
    return sessionStorage.getItem(STORED) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  }

  /** GET `path`, or POST `body` to it. Throws a Refusal, or an AbortError where `signal` says so. */
  async ask(path, body, signal) {
    const headers = {};
    if (body !== undefined) headers["content-type"] = "application/json";
    if (this.key) headers["x-api-key"] = this.key;
    const method = body === undefined ? "GET" : "POST";
    let response;
    try {
      response = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
      if (response.ok) return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The endpoint cannot be reached.");
    }
    throw new Refusal(await this.#sentence(response), response.status);
  }

  async #sentence(response) {
    let error = {};
    try {
      error = (await response.json()).detail[0] ?? {};
    } catch {
      // Not an answer of the endpoint but of something in front of it; the status says enough.
    }
    const message = error.message ?? `status ${response.status}`;
    const wait = response.headers.get("retry-after");
    if (response.status === 401) {
      return this.key ? "The endpoint does not know this key." : "The endpoint asks for a key.";
    }
    if (wait !== null) return `No answer now: ${message.split(";")[0]}; try again in ${wait} s.`;
    return `No answer: ${error.field ? `${error.field}: ` : ""}${message}.`;
  }
}
