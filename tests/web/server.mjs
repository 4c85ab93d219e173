// Answers of a server, as fetch gives them, and the time that they take.

export const json = (value, status = 200) => new Response(JSON.stringify(value), { status });
export const bytes = (values) => new Response(new Uint8Array(values));

/** Wait until what was fetched has arrived and been worked on. */
export async function arrived() {
  for (let turn = 0; turn < 4; turn++) await new Promise((resolve) => setImmediate(resolve));
}
