// Imagine from Node, with nothing but the .proto file:
//   npm install @grpc/grpc-js @grpc/proto-loader
//   node imagine.mjs path/to/worldflux_dist/serve/imagination.proto 127.0.0.1:50051
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const [proto, address] = process.argv.slice(2);
const { Imagination } = grpc.loadPackageDefinition(loadSync(proto, { defaults: true, longs: Number })).worldflux.imagination.v1;
const client = new Imagination(address, grpc.credentials.createInsecure());
const floats = (tensor) => new Float32Array(new Uint8Array(tensor.data).buffer);
const ask = (method, request) => new Promise((resolve, reject) =>
  client[method](request, (error, answer) => (error ? reject(error) : resolve(answer))));

const model = await ask('GetModel', {});
console.log('model', `${model.family}:${model.preset}`, 'version', model.version.gradientSteps);

// A first look at an observation of zeros, and what the served agent would do.
const observations = { tensors: model.observations.map(({ name, datatype, shape }) => {
  const size = shape.reduce((product, n) => product * Number(n), 1) * (datatype === 'UINT8' ? 1 : 4);
  return { name, datatype, shape: [1, ...shape.map(Number)], data: Buffer.alloc(size) };
}) };
const acted = await ask('Act', { observations, greedy: true });
console.log('action', [...floats(acted.action)]);

// Five steps of the served policy from there, as they come.
const request = { observations, horizon: 5, seed: 7, heads: ['reward', 'continue'], byStep: true };
for await (const { firstStep, outputs } of client.Imagine(request)) {
  const [reward, going] = outputs.map((tensor) => floats(tensor)[0]);
  console.log('step', firstStep, 'reward', reward, 'continue', going);
}
client.close();
