// The side of `driven.py` that a js peer takes: it says who it is, then obeys JSON lines until stdin ends.
// {"do": name, "args": [...]} in, {"ok": ...} or {"error": ...} out.
import { createInterface } from 'node:readline'

const say = (value) => process.stdout.write(JSON.stringify(value) + '\n')

export async function obey (node, commands) {
  say({ peer_id: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) })
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line)
    try {
      say({ ok: await commands[command.do](...command.args) ?? null })
    } catch (error) {
      say({ error: `${error.name}: ${error.message}` })
    }
  }
  process.exit(0)
}
