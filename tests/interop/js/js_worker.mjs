// A peer of js-libp2p, with the commands below.
import { noise } from '@chainsafe/libp2p-noise'
import { quic } from '@chainsafe/libp2p-quic'
import { yamux } from '@chainsafe/libp2p-yamux'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { dcutr } from '@libp2p/dcutr'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import { obey } from './obey.mjs'

const settings = JSON.parse(process.argv[2]) ?? {}
const transports = { tcp: tcp(), quic: quic(), relay: circuitRelayTransport() }
const services = {
  identify: identify(),
  identifyPush: identifyPush(),
  ping: ping({ runOnLimitedConnection: true }),
  dht: kadDHT({
    protocol: settings.kad ?? '/ipfs/kad/1.0.0',
    clientMode: false,
    peerInfoMapper: passthroughMapper, // the default drops loopback addresses
    allowQueryWithZeroPeers: true
  })
}
if (settings.relay) services.relay = circuitRelayServer()
if (settings.dcutr) services.dcutr = dcutr()
const node = await createLibp2p({
  addresses: { listen: settings.listen, announce: settings.announce },
  transports: settings.transports.map((name) => transports[name]),
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services,
  connectionGater: { denyDialMultiaddr: () => false } // loopback, too
})

await node.handle('/echo/1', (stream) => {
  stream.addEventListener('message', (event) => stream.send(event.data))
  stream.addEventListener('remoteCloseWrite', () => stream.close())
}, { runOnLimitedConnection: true })

const soon = () => ({ signal: AbortSignal.timeout(15_000) })

const commands = {
  dial: async (addr) => {
    const connection = await node.dial(multiaddr(addr))
    return { addr: connection.remoteAddr.toString(), muxer: connection.multiplexer }
  },
  ping: (addr) => node.services.ping.ping(multiaddr(addr), soon()),
  addrs: () => node.getMultiaddrs().map(String),
  paths: (peer) => node.getConnections(peerIdFromString(peer)).map((connection) => connection.remoteAddr.toString()),
  known: async (peer) => {
    const found = await node.peerStore.get(peerIdFromString(peer))
    return { protocols: found.protocols, agent: new TextDecoder().decode(found.metadata.get('AgentVersion')) }
  },
  find_peer: async (peer) => (await node.peerRouting.findPeer(peerIdFromString(peer), soon())).multiaddrs.map(String),
  provide: (cid) => node.contentRouting.provide(CID.parse(cid), soon()),
  find_provider: async (cid) => {
    for await (const provider of node.contentRouting.findProviders(CID.parse(cid), soon())) return provider.id.toString()
  },
  // Sends `count` messages of `size` bytes, and resolves to how many came back in order.
  echo: async (addr, count, size) => {
    const stream = await node.dialProtocol(multiaddr(addr), '/echo/1', { runOnLimitedConnection: true })
    let received = 0
    const done = new Promise((resolve, reject) => {
      stream.addEventListener('message', (event) => {
        for (const byte of event.data.subarray()) {
          if (byte !== Math.floor(received / size) % 251) reject(new Error(`byte ${received} is wrong`))
          received += 1
        }
        if (received === count * size) resolve()
      })
      stream.addEventListener('close', (event) => reject(new Error(`closed after ${received} bytes: ${event.error}`)))
    })
    for (let i = 0; i < count; i++) {
      if (!stream.send(new Uint8Array(size).fill(i % 251))) await stream.onDrain(soon())
    }
    await stream.close()
    await done
    return received
  }
}

await obey(node, commands)
