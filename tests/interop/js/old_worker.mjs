// A peer of an older js-libp2p (0.46 to 2.x) with the same commands as go_library_worker.py.
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { mplex } from '@libp2p/mplex'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { obey } from './obey.mjs'

const settings = JSON.parse(process.argv[2]) ?? {}

// 0.46 has these services in its own package, and calls things by other names.
async function parts () {
  const encrypters = { noise: () => noise() }
  const muxers = { yamux: () => yamux(), mplex: () => mplex() }
  try {
    const { identifyService } = await import('libp2p/identify')
    const { pingService } = await import('libp2p/ping')
    return { encrypters, muxers, services: { identify: identifyService(), ping: pingService() } }
  } catch (error) {
    if (error.code !== 'ERR_PACKAGE_PATH_NOT_EXPORTED') throw error
  }
  const { identify, identifyPush } = await import('@libp2p/identify')
  const { ping } = await import('@libp2p/ping')
  const { plaintext } = await import('@libp2p/plaintext')
  const { tls } = await import('@libp2p/tls')
  const services = { identify: identify(), identifyPush: identifyPush(), ping: ping() }
  return { encrypters: { ...encrypters, tls: () => tls(), plaintext: () => plaintext() }, muxers, services }
}

const { encrypters, muxers, services } = await parts()
const encryption = (settings.encrypters ?? ['noise']).map((name) => encrypters[name]())
const options = {
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: encryption,
  connectionEncryption: encryption, // the name of 0.46
  streamMuxers: (settings.muxers ?? ['yamux']).map((name) => muxers[name]()),
  services,
  connectionGater: { denyDialMultiaddr: () => false }
}
if (settings.key) {
  const { generateKeyPair } = await import('@libp2p/crypto/keys')
  options.privateKey = await generateKeyPair(settings.key, settings.key === 'RSA' ? 2048 : undefined)
}
const node = await createLibp2p(options)

await node.handle('/echo/1', ({ stream }) => { stream.sink(stream.source).catch((error) => stream.abort(error)) })

const connection = (peer) => node.getConnections().find((found) => found.remotePeer.toString() === peer)

const commands = {
  connect: async (addr) => (await node.dial(multiaddr(addr))).remoteAddr.toString(),
  ping: async (peer) => await node.services.ping.ping(connection(peer).remoteAddr) >= 0,
  // Sends `blocks` of 64 KiB on a stream and resolves to how many bytes came back in order.
  echo: async (peer, blocks) => {
    const stream = await connection(peer).newStream('/echo/1')
    const block = Uint8Array.from({ length: 65536 }, (_, i) => i & 255)
    let received = 0
    const send = stream.sink((async function * () { for (let i = 0; i < blocks; i++) yield block })())
    for await (const data of stream.source) {
      for (const byte of data.subarray()) {
        if (byte !== (received & 255)) throw new Error(`byte ${received} is wrong`)
        received += 1
      }
    }
    await send
    return received
  }
}

await obey(node, commands)
